"""Ground floor: vocabulary, task, git, editing and the immutable `prepare` package. Imports nothing of ours."""
