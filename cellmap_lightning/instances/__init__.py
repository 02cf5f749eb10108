"""Instance segmentation: from predictions to numbered objects, on arrays and out of core."""
