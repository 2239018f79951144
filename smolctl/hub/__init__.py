"""The Hugging Face Hub: one client, one table of errors, one time limit."""
