"""The gateway's decisions, without a server."""
