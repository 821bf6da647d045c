"""The bridge to RabbitMQ, on a real one and a real Redis."""
