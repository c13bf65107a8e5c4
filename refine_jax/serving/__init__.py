"""A server with OpenAI's protocol on the engine (docs/server.md)."""
