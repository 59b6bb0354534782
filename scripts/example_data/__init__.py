"""The example data set: small rendered rooms and streets with exact labels for all six tasks.

The real archives are large and carry their own terms. This package draws furnished rooms with people, and streets, by
plain ray casting in NumPy, derives every label from the geometry, and writes the folder layouts of NYUDv2,
PASCALContext and Cityscapes, so that every loader, loss, metric and training loop can be tried in minutes on any
machine without a download.

write, layouts                      the folders, in parallel and all or nothing; what each file holds
render, shading                     one scene to an image and its label maps; light on surfaces
scene, street                       puts a room, or a street, together from a seed
fittings, furniture, small, human   walls and what hangs there; what stands in the room, on it; who lives there
stage                               the vocabulary of these four: things, poses, materials
geometry, texture, labels           solids and rays; procedural colours; classes of a thing in each data set
"""
