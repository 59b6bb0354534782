"""The folder that holds NYUDv2/ and PASCALContext/. Overridden by $DB_ROOT and by `db_root=...` on the command line.

A relative path is taken from the repository's root.
"""

db_root = "datasets"
