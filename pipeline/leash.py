"""Tie a process to its supervisor's life: `python -I -S leash.py SIGNAL PARENT PIPE COMMAND...`.

A supervisor that is killed with SIGKILL cannot stop what it started. So each child begins here and then becomes the
command (the process id stays the same). On Linux the kernel is asked to send SIGNAL when the parent dies. Elsewhere
(or where Python lacks ctypes) a small watcher stays behind: it blocks on PIPE, whose other end only the supervisor
holds, and sends SIGNAL when that end closes.

Runs alone, before anything of ours is imported; standard library only. `prefix` tells a supervisor how to call it.
"""

import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK_S = 0.5  # the watcher also leaves when its charge has ended


def prefix(signal_number: int, pipe: int) -> list[str]:
    """Return what stands before a command that is to get *signal_number* when this process dies.

    Args:
        pipe: the read end of a pipe, passed on to the command's process; its write end stays with this process alone.
    """
    return [sys.executable, "-I", "-S", __file__, str(int(signal_number)), str(os.getpid()), str(pipe)]


def tie(signal_number: int, parent: int, pipe: int) -> None:
    """Arrange that this process gets *signal_number* when process *parent* dies."""
    if not _tie_by_kernel(signal_number):
        _tie_by_pipe(signal_number, pipe)
    if os.getppid() != parent:  # it died before the arrangement stood
        os._exit(1)


def _tie_by_kernel(signal_number: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _tie_by_pipe(signal_number: int, pipe: int) -> None:
    charge = os.getpid()
    if os.fork() != 0:
        return
    import select

    os.setsid()
    for descriptor in range(256):  # a lock or a log of our charge must not outlive it in our hands
        if descriptor != pipe:
            try:
                os.close(descriptor)
            except OSError:
                continue
    while os.getppid() == charge:
        readable, _, _ = select.select([pipe], [], [], LOOK_S)
        if readable:
            os.kill(charge, signal_number)
            break
    os._exit(0)


def main(arguments: list[str]) -> None:
    """Tie this process, then become the command."""
    signal_number, parent, pipe = (int(argument) for argument in arguments[:3])
    command = arguments[3:]
    tie(signal_number, parent, pipe)
    os.set_inheritable(pipe, False)
    try:
        os.execvp(command[0], command)  # noqa: S606 - the supervisor's own command line
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
