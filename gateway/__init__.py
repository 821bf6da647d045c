"""The HTTP gateway: one file per service, put together in `gateway.app`."""
