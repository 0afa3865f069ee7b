.PHONY: check test test-comfy

check:
	ruff check .
	ruff format --check .

test:
	pytest

test-comfy:
	pytest tests/comfy
