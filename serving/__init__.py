"""MindOmni as a service: an HTTP server in OpenAI's form, offline batches, and many GPUs by Ray."""
