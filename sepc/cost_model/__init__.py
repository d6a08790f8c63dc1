"""The analytic cost model: machine + region + tiling → bytes moved per memory level → predicted time.

Imports neither TVM nor torch.
"""
