"""The demo as a Hugging Face Space: README.md, requirements.txt and this file, beside the gensample wheel."""

from __future__ import annotations

from gensample.apps.demo import load_page, serve

if __name__ == "__main__":
    page, engine = load_page("fashion")
    serve(page, engine, host="0.0.0.0", port=7860)  # a Space's container is reached from outside
