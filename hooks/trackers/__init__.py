"""What pass this is: prefill or decode and which cache's rows, or which denoising step and which guidance rows."""
