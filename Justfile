# `just` runs lint and test; `just --list` is the manual. Arguments pass through: `just test -k lease`.

python := if path_exists(justfile_directory() / ".venv/bin/python") == "true" { justfile_directory() / ".venv/bin/python" } else { "python3" }

# lint and test
default: lint test

# run the tests in parallel; `just test -k lease` chooses some
test *arguments:
    {{ python }} -m pytest -n {{ env("TEST_WORKERS", "auto") }} {{ arguments }}

# check style, form and types
lint:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .
    {{ python }} -m mypy

# put every file into its form
format:
    {{ python }} -m ruff check --fix .
    {{ python }} -m ruff format .

# run everything on this machine
up *arguments:
    {{ python }} -m penstock up {{ arguments }}

# run one stage, e.g. `just stage llm`
stage +names:
    {{ python }} -m penstock stage {{ names }}

# ask many questions at once and report percentiles
loadtest *arguments:
    {{ python }} -m penstock loadtest {{ arguments }}

# harm a running system and check that nothing accepted is lost; `just faults --scenario 3 --seed 7`
faults *arguments:
    {{ python }} -m tests.faults {{ arguments }}

# measure what a job costs and how long it takes: hops, query, backlog, tail, start, ingest or batch; see docs/PERFORMANCE.md
bench *arguments:
    {{ python }} -m tests.bench {{ arguments }}

# bring the tables of the history up to date
migrate *arguments:
    {{ python }} -m penstock db upgrade {{ arguments }}

# show what runs and how deep each queue is
status *arguments:
    {{ python }} -m penstock status {{ arguments }}

# check a running system step by step, and say what to do where something is wrong
verify *arguments:
    {{ python }} -m penstock verify {{ arguments }}

# talk to the Redis of `up` (needs redis-cli or valkey-cli)
redis-cli *arguments:
    @socket=$({{ python }} -c "from pathlib import Path; from pipeline.private_redis import socket_path; print(socket_path(Path('.penstock')))"); \
    cli=$(command -v redis-cli || command -v valkey-cli) || { echo "neither redis-cli nor valkey-cli is on PATH" >&2; exit 127; }; \
    exec "$cli" -s "$socket" {{ arguments }}

# follow the log of the Redis of `up`; the other processes log where `up` runs
logs:
    tail -n 50 -F .penstock/redis.log
