"""What the pipeline XML names: ISMRMRD acquisitions in, ISMRMRD images out, as generators."""
