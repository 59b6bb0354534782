"""A page about an evaluation: one file without a network, for a screen, a phone, paper and a screen reader.

`review` looks at every image while it is evaluated, `plots` draws numbers, `page` is HTML, `write` puts them together.
What is shown of a task is said by its row: by its evaluators' `figures` and `of_image`, and by its view.
"""
