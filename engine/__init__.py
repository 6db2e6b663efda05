"""One replica: token ids in, token ids, log-probabilities and routing out. Each folder is a process or a noun."""
