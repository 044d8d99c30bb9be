"""Pages made of run folders: the report of one run, the comparison of several, one rollout token by token."""
