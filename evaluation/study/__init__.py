"""What people make of concepts: items, pages, a server, and what the answers say."""
