"""Learn to restore images: enlarged, without noise, without rain."""
