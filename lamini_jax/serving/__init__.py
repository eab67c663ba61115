"""A server of the OpenAI API with a memory: HTTP in front, an engine that owns the devices behind."""
