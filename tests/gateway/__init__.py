"""The gateway over real HTTP: a real server, and a pipeline that a test plays by hand."""
