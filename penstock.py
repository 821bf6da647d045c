"""Penstock leads requests to language models through Redis Streams and loses none."""
