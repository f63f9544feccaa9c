"""A server under many clients."""
