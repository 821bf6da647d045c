"""The load tester and the mock replica, its other end. Speaks HTTP like any client; imports nothing of ours."""
