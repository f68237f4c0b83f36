"""A local web server: OpenAI's API and a chat page, over one copy of the weights."""
