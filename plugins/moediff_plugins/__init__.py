"""The strategies that ship with moediff, one wing per role, found like everybody's plugins."""
