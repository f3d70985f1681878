"""Turn the user's data into batches of rows.

What comes in is a tensor, a mapping, a Dataset, a DataLoader, any iterable, or a one-line description such as
"text:FILE". What goes out is batches by step number, in training order or in the data's order. Read `batches` first,
then `sources` for the descriptions.
"""
