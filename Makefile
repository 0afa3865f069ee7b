.PHONY: check test test-comfy test-browser docs locales gallery pictures

check:
	ruff check .
	ruff format --check .

test:
	pytest

test-comfy:
	pytest tests/comfy

test-browser:
	pytest -m browser

# Written from the code, held to it by tests.
docs:
	python -m comfyui_nibble.prompts.page
	python -m comfyui_nibble.checkpoints.forms  # prints the table of docs/formats/README.md

# These need a ComfyUI.
locales:
	python tests/comfy/schemas.py

gallery:
	python tests/comfy/gallery.py

pictures:
	python tests/browser/pictures.py
