"""One replica: token ids in, token ids, log-probabilities and routing out.

Each folder is one process, or one concept that several processes share.
"""
