"""Monocular 3-D detection after FCOS3D (Wang et al., ICCV 2021): what a point predicts, its targets and losses."""
