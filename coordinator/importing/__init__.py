"""`swarm import PATH`: a session that was run elsewhere, from its results.tsv or git branch, as a machine of its own.

Invariants: importing the same session again changes nothing (ids come from its contents, never from its path); what a
log does not say is left out, not made up; the source is only read.
NOT covered: a row that was changed after it was imported; a log grows at its end.
"""
