#!lua flags=no-writes
-- deliveries: how do these deliveries stand?
-- ARGV[1] how many fields  ARGV[2..] the fields that are wanted of each record, then ids
-- Returns: per id the values of these fields; all nil where there is no such record (any more).
local found, fields = {}, {}
for number = 1, tonumber(ARGV[1]) do fields[number] = ARGV[1 + number] end
for at = 2 + #fields, #ARGV do found[#found + 1] = call('HMGET', KEY.delivery .. ARGV[at], unpack(fields)) end
return found
