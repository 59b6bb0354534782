"""The demo page (`scripts/app.py`): what it shows of a prediction, and the page itself."""
