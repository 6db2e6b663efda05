"""What models write in a chat beside text: calls of tools, and reasoning. One file for each way to write calls.

Readers take the text of an answer in pieces, as it is streamed, and give the same whatever the pieces are.
"""
