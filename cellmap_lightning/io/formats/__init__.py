"""Volume formats besides OME-NGFF, one module each, behind the protocol `VolumeFormat`; see docs/formats.md."""
