"""Diffusers pipelines of gensample; import them as `gensample.pipelines`."""
