#!lua flags=no-writes
-- deliveries: how do these deliveries stand?
-- ARGV[1..] ids
-- Returns: per id its record's fields and values, flat; nothing where there is none (any more).
local found = {}
for number, id in ipairs(ARGV) do found[number] = call('HGETALL', KEY.delivery .. id) end
return found
