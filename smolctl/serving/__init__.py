"""`smolctl serve`: a server with OpenAI's API."""
