# Needs Python 3.11 or later, git and make. README.md names the plain-shell equivalents.

.PHONY: claims test docs environment lock

# Runs six papers' claims at laptop scale: verdicts, intervals, plots. All that is built
# (`varan run --all`) takes about an hour.
claims: environment
	@.venv/bin/varan run 6 21 24 31 37 40 --scale laptop

# Lint, format, types, docstring examples, unit tests, every row at smoke scale.
test: environment
	@scripts/test

# The documentation site, under build/docs.
docs: environment
	@scripts/docs

environment:
	@scripts/environment

# Locks the newest versions that pyproject.toml allows. Run it, then `make test`.
lock:
	@scripts/lock
