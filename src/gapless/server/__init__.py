"""The OpenAI-compatible server: FastAPI in front, the engine in a process of its own behind a unix socket."""
