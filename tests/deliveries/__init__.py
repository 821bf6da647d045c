"""Deliveries: real servers on loopback that take them, and what is sent to them."""
