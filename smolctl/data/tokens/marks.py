"""Marks of a conversation's tokens, stored with the id in one integer.

The marks are bits above every id, so code that stores, hashes, reads and shuffles tokens treats them alike.
Tokens of plain text have none.
"""

CONTEXT = 1 << 30  # part of the context, but not trained on
FIRST = 1 << 29  # starts a conversation: attention does not reach before it
IDS = FIRST - 1  # the bits of the id; with the marks, it fits a signed 32-bit integer
