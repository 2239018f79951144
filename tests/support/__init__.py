"""What several tests use: tiny models and runs, loopback servers, files to read."""
