"""The site made of docs/: its configuration for mkdocs, and what mkdocs does not do by itself."""
