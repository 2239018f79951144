"""What a token of a conversation is for, beside its id in one integer.

The marks lie in bits above every id, so that whatever stores, hashes, reads and shuffles tokens does the same
for them. Tokens of plain text have none.
"""

CONTEXT = 1 << 30  # is read, and not trained on
FIRST = 1 << 29  # begins a conversation: attention does not reach behind it
IDS = FIRST - 1  # the bits of the id; all of it fits a signed integer of 32 bits
