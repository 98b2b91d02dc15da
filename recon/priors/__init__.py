"""Prior knowledge about images: penalties, proximal operators and covariances."""
