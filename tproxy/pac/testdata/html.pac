<!DOCTYPE html>
<html><body>Please sign in to use this network.</body></html>
