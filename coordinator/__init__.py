"""The coordinator service. Imports `worker` (to launch it) and `shared`."""
