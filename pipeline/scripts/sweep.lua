#!lua flags=no-writes
-- sweep: which of these jobs have ended?
-- ARGV: job ids
-- Returns: per id its completion, or 'alive', or 'gone' (neither completion nor live record).
local names = {}
for i, id in ipairs(ARGV) do names[i] = KEY.completion .. id end
local answer = call('MGET', unpack(names)) -- a key of a wrong type reads as missing, and stops nobody else
for i, id in ipairs(ARGV) do
  if not answer[i] then answer[i] = call('EXISTS', KEY.live .. id) == 1 and 'alive' or 'gone' end
end
return answer
