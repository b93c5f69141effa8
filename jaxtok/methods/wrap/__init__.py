"""Methods that hold another method: where its budget goes, and where what it keeps stands."""
