"""One machine's ratchet loop: propose, commit, run, decide, keep or reset. Imports `shared` only."""
