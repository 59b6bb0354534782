"""The example data set: small rendered rooms with exact labels for all six tasks.

The real NYUDv2 and PASCALContext archives are large and carry their own terms. This package draws furnished
rooms with people by plain ray casting in NumPy, derives every label from the geometry, and writes both folder
layouts, so that every loader, loss, metric and training loop can be tried in minutes on any machine without a
download.

labels     the classes a thing carries in each data set
geometry   solids, rays, first hit, shadow test
texture    procedural colours
stage      the vocabulary of the next four: things, poses, paints
fittings   the room itself and what hangs on its walls
furniture  what stands in it
small      what stands on the furniture
human      jointed figures: people, cats, dogs
scene      puts a room together from a seed
shading    light on surfaces
render     one scene to an image and its label maps
write      the folder layouts, in parallel and all or nothing
"""
