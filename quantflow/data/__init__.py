"""Data: conversion of batches to model inputs, and the random sample of examples."""
